"""The wireless link from the edge server to the user: channel, features, payload and wire format."""

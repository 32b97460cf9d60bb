"""The wireless link between the edge server and the user's device: channel, features, payload and wire format."""

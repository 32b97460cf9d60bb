"""The edge server: requests over HTTP in, messages in the wire format out."""

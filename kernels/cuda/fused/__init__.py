"""What stands between the linear layers of a decoder, each in one pass over its data."""

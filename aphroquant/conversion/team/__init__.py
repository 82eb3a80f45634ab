"""Workers that go through one walk together: each has a share of the windows, and solves a share of the layers."""

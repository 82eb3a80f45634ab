"""Before any work: what outputs will be, whether engines take them, what they need, and how long it will last."""

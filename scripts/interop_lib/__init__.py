"""What `scripts/interop.py` is made of: environments, cases, comparison, and the table in README.md."""

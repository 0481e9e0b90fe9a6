"""Networks: each a file of its own, on the contract that the tests hold (see README.md here)."""

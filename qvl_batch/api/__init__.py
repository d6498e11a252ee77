"""What people hold in a notebook, and the parity certificate."""

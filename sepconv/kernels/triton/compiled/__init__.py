"""What needs Triton: the programs, and their launch. Nothing else imports it, and this only for tensors on a GPU."""

"""What computes: kernels behind one signature, which know nothing of autograd, modules or the dispatcher."""

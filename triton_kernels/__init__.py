"""The chapters behind kernels.py: common, index, dense, sparse, loss, cross_entropy, and hopper (Gluon)."""

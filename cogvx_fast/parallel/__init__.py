"""Several processes, one clip: who computes what of it, and what they tell each other.

It knows tensors and `torch.distributed`; what a transformer or an autoencoder is, those who call it know.
"""

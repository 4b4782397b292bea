"""GPU operations for CogVideoX. Knows tensors only: nothing here imports `cogvx_fast` or diffusers."""

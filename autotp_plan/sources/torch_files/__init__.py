"""Files of `torch.save` (`pytorch_model.bin`), read as the safetensors files that they could have been.

Their tensors are byte ranges of a zip file. The pickle in it, which says which, is read as data: it runs nothing, and
needs no torch.
"""

"""The network: vision tower, connector, packer and decoder, in PyTorch only. No file formats."""

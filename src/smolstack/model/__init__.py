"""The network: vision tower, connector, packer, decoder. Torch only; knows no file format."""

"""From images and prompts to a Batch: geometry, tiles, chat template, tokens."""

"""From logits to text: sampling, stopping, streaming, and the loop that joins them."""

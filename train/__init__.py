"""Train GQA and MSA language models side by side and compare them."""

"""Between text and tokens: templates, tokenizers, stop strings, and the one road from a request to its answer."""

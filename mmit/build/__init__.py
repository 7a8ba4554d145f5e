"""Building instruction data: annotated sets by templates. Reads rows and templates, writes one output folder."""

"""Plain WebDataset tars with an index: `writer` makes them, `scan` indexes foreign ones, `reader` serves records."""

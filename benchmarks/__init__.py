"""One sub-benchmark a file: `add_options(parser)`, and `run(options)` that returns rows of a table."""

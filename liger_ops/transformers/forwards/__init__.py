"""What runs in place of the stock forwards: one file per kind of forward."""

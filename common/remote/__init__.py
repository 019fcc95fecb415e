"""Files at URLs (s3://, gs://, hf://, whatever fsspec opens): a local copy stands for each; docs/artifacts.md.

`places` maps URLs to copies, `objects` speaks to the store, `copies` keeps a copy equal to it, `leases` lets one job at
a time hold a run. For a path that is no copy, `copies` and `leases` do nothing.
"""

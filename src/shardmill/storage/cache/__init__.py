"""Buckets behind a bucket: objects of an origin on local disk, brought in block by block when somebody reads them."""

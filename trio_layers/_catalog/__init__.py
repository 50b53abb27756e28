"""The store's database: rows of blobs, trees, layers, images and leases."""

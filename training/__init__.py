"""Scripts that train what the package bundles."""

"""Sources of data, prepared by tensorflow-datasets."""

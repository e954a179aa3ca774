"""A segmentation head's loss in two passes over bands of rows; no kernels of its own (`dnc_kernels.nn.DNCHead` calls them)."""

"""segment/: label the pixels of scientific images, and measure how well.

``model`` names the networks (``unet`` our own, ``library`` those of segmentation-models-pytorch),
``loss`` what training lowers, ``metrics`` the scores of pixels, summed as a stream, ``histogram``
their precision-recall curves and thresholds, ``instances`` objects cut out of a mask and their
scores. Neither torch nor Ray is loaded by importing this package.
"""

"""Real small images for the tutorial: scikit-learn's handwritten digits as PNG files in folders of their classes.

photos/ has those that the search sees. new/ has those of somebody who comes later: other writers, and everything one
pixel to the right, as from another scanner. Run it where the folders are to be.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

OF_OTHER_WRITERS = 360  # the last ones

digits = load_digits()
for number, (image, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
    later = number >= len(digits.target) - OF_OTHER_WRITERS
    place = Path("new" if later else "photos", f"{digit}")
    place.mkdir(parents=True, exist_ok=True)
    pixels = np.rint(image * (255 / 16)).astype(np.uint8)  # (8, 8), 0 to 16 until here
    if later:
        pixels = np.pad(pixels[:, :-1], ((0, 0), (1, 0)))
    Image.fromarray(pixels).save(place / f"{number:04}.png")
print("photos/ and new/ have a folder for each of the digits 0 to 9")

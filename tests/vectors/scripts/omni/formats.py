"""Writes the same pictures and sound in other formats: python formats.py MEDIA (needs pillow, numpy, soundfile)."""
import struct
import sys

import numpy as np
import soundfile
from PIL import Image

media = sys.argv[1]
picture = Image.open(f"{media}/c_64x64.png").convert("RGB")
picture.save(f"{media}/c.bmp")
picture.save(f"{media}/c.webp", lossless=True)
picture.save(f"{media}/c.jpg", quality=95)
picture.save(f"{media}/c.gif")
# The same, lying on its side, with the note that says so: 6, turned by a quarter to the right.
exif = Image.Exif()
exif[0x0112] = 6
picture.transpose(Image.Transpose.ROTATE_90).save(f"{media}/c_turned.jpg", quality=95, exif=exif)
picture.convert("RGBA").save(f"{media}/c_rgba.png")
Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(f"{media}/c_16bit.png")
frames = [Image.open(f"{media}/video_{i}.png").convert("RGB") for i in range(5)]
frames[0].save(f"{media}/video.webp", save_all=True, append_images=frames[1:], duration=500, lossless=True)
frames[0].save(f"{media}/video.png", save_all=True, append_images=frames[1:], duration=500)
frames[0].save(f"{media}/video.gif", save_all=True, append_images=frames[1:], duration=500)
samples, rate = soundfile.read(f"{media}/short.wav", dtype="int16")
soundfile.write(f"{media}/short.flac", samples, rate)
soundfile.write(f"{media}/short.ogg", samples, rate)
soundfile.write(f"{media}/short.mp3", samples, rate)
quarter = np.repeat(samples, 3)
soundfile.write(f"{media}/short_48k_4ch.wav", np.stack([quarter] * 4, 1), 48000)

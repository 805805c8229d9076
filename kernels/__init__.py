"""Hand-written Triton kernels: one launch walks every tensor of a bucket.

``layout`` says what the tables in device memory hold, ``table`` builds them, ``stream`` reads
them; ``reduce``, ``perturb`` and ``update`` are the three passes of a sharpness-aware step. They
are given the mathematics of a method as functions, from a file of ``ascent/``, ``descent/`` or
``base/`` each, and know none by name. Nothing here knows an optimizer class, and importing this
package does not import Triton: ``layout`` and ``table`` are plain numpy, so they can be read and
tested without.
"""

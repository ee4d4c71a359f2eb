"""SAELens."""

from fastsae.patch import Library

LIBRARY = Library("sae-lens", "6.54", "6.55", {})

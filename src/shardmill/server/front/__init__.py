"""Plain reads of objects, answered without a framework; everything else is aiohttp's."""

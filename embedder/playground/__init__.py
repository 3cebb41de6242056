"""The playground: a page to look at what the vectors do, and the images that it searches."""

"""Pages in Flower. `world` makes runs of every kind; `server` is Flower's application in this process."""

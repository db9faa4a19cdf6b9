"""JSON Schemas: what one may be (`rules`), and what is wrong with a value (`mistakes`, `process`)."""

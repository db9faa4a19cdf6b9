"""JSON Schema: which schemas are accepted (`rules`), and checks of values (`mistakes`, `process`)."""

"""Which rank each layer gets: what every rank costs and loses, and one choice for all layers under one budget."""

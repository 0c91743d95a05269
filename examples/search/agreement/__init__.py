"""A search for one weight a model without labels: on its texts, each model is the teacher."""

"""What a training needs, before it is begun: memory a rank, operations, days. By arithmetic alone, without torch."""

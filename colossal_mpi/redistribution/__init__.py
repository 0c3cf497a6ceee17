"""Changes of layout: the only code that moves a distributed array between ranks.

``DistArray.redistribute``, indexing, the products of ``linalg`` and the gradient buckets of ``layers`` call this
package. It plans from global metadata which boxes of the index space each rank sends and receives, and calls ``comm``
to move them.
"""

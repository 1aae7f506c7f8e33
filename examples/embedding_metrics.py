# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software distributed under the License is distributed on
# an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the
# specific language governing permissions and limitations under the License.
"""How much a pruned encoder sees the same similarities between images as the model that it comes from."""

from collections.abc import Iterator

import torch
from torch.nn import functional as F


QUERIES_AT_ONCE = 1024  # similarities of all pairs of many images would not fit


def embedding_agreement(student: torch.Tensor, teacher: torch.Tensor, num_neighbours: int = 10) -> dict[str, float]:
    """How alike two models embed the same images.

    Args:
        student, teacher: embeddings (images, channels), of 2 images or more.
        num_neighbours: of which the overlap is measured; of fewer images all others.

    Returns:
        `cosine`: mean cosine of the two embeddings of an image, in [-1, 1]. `retrieval_agreement`: share of the images
        of which both models find the same other image most similar. `neighbour_overlap`: mean share of the
        `num_neighbours` most similar images that are the same.

    Raises:
        `ValueError`: for fewer images, or a different number of them.
    """
    if len(student) != len(teacher) or len(student) < 2:
        raise ValueError(
            f"There are {len(student)} embeddings of the model and {len(teacher)} of the teacher; give those of the "
            "same images, two or more."
        )
    same_first, shared = [], []
    count = min(num_neighbours, len(student) - 1)
    found = (nearest(embeddings, embeddings, count, skip_self=True) for embeddings in (student, teacher))
    for own, other in zip(*found):
        same_first.append(own[:, 0] == other[:, 0])
        # (n, k, 1) against (n, 1, k): which of ours are among those of the teacher
        shared.append((own[:, :, None] == other[:, None]).any(dim=2).float().mean(dim=1))
    return {
        "cosine": F.cosine_similarity(student.float(), teacher.float(), dim=-1).mean().item(),
        "retrieval_agreement": torch.cat(same_first).float().mean().item(),
        "neighbour_overlap": torch.cat(shared).mean().item(),
    }


def knn_agreement(
    student: torch.Tensor,
    teacher: torch.Tensor,
    student_gallery: torch.Tensor,
    teacher_gallery: torch.Tensor,
    gallery_labels: torch.Tensor,
    k: int = 20,
) -> float:
    """Share of the images to which both models give the same class by the `k` most similar images of a gallery.

    Args:
        student, teacher: embeddings (images, channels) of the same images.
        student_gallery, teacher_gallery: (gallery, channels)
        gallery_labels: (gallery,), classes from 0.
    """
    own = knn_classes(student, student_gallery, gallery_labels, k)
    other = knn_classes(teacher, teacher_gallery, gallery_labels, k)
    return (own == other).float().mean().item()


def knn_classes(queries: torch.Tensor, gallery: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
    """Classes (n,) by the majority of the `k` most similar images; of classes with as many, the first."""
    num_classes = int(labels.max()) + 1
    count = min(k, len(gallery))
    found = [F.one_hot(labels[places], num_classes).sum(dim=1) for places in nearest(queries, gallery, count)]
    return torch.cat(found).argmax(dim=1)


def nearest(
    queries: torch.Tensor, gallery: torch.Tensor, count: int, skip_self: bool = False
) -> Iterator[torch.Tensor]:
    """Places of the `count` most similar embeddings by the cosine, the most similar first: (n, count), some at a time.

    Args:
        queries: (n, channels)
        gallery: (images, channels)
        count: at most as many as there are to choose from.
        skip_self: whether the gallery is the queries, none of which is then its own neighbour.
    """
    queries, gallery = (F.normalize(embeddings.float(), dim=-1) for embeddings in (queries, gallery))
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        similarities = queries[start : start + QUERIES_AT_ONCE] @ gallery.T
        if skip_self:
            rows = torch.arange(len(similarities))
            similarities[rows, start + rows] = -torch.inf
        yield similarities.topk(count, dim=1).indices

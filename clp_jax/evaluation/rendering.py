"""Small pictures of a MuJoCo scene on a CPU: two milliseconds where the simulators' own settings take hundreds.

What costs time without a GPU are shadow maps, reflections, multisampling and meshes of tens of thousands of faces, of
which a picture of 64 pixels shows nothing.
"""

import contextlib
import copy
import ctypes
import importlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from clp_jax.errors import InputError

CELL = 0.02
"""Metres: vertices of a mesh closer than this become one, which at 64 pixels nobody sees."""
_MOST_GEOMS = 1000
_WITHOUT = ("SHADOW", "REFLECTION", "SKYBOX", "HAZE", "FOG")


class Renderer:
    """Draws a scene; the physics never see its simplified copy of the model.

    Args:
      model: a compiled ``mujoco.MjModel``.
      size: height and width in pixels; a number for both.
      sites: whether to draw sites, which are markers that no real camera would see.
      fast: without what is costly on a CPU; else as the model says.
      cell: metres; where it is fast, vertices of a mesh closer than this become one.
      geom_groups: the groups of shapes that are drawn.

    Raises:
      InputError: MuJoCo finds no library to draw with.
    """

    def __init__(
        self,
        model: Any,
        size: int | tuple[int, int],
        *,
        sites: bool = False,
        fast: bool = True,
        cell: float = CELL,
        geom_groups: Sequence[int] = (0, 1, 2),
    ):
        mujoco = import_mujoco()
        height, width = (size, size) if isinstance(size, int) else size
        simple = copy.copy(model)
        simple.vis.global_.offheight, simple.vis.global_.offwidth = height, width
        if fast:
            simple.vis.quality.shadowsize = simple.vis.quality.offsamples = 0
            for mesh in range(simple.nmesh):
                _simplify(simple, mesh, cell)
        try:
            self._context: Any = mujoco.GLContext(width, height)
            self._context.make_current()
            self._library = mujoco.MjrContext(simple, mujoco.mjtFontScale.mjFONTSCALE_150)
        except Exception as error:  # MuJoCo's back ends each raise their own
            raise InputError(_cannot_draw(error)) from error
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._library)
        self._mujoco, self._model = mujoco, simple
        self._scene = mujoco.MjvScene(simple, maxgeom=_MOST_GEOMS)
        for name in _WITHOUT if fast else ():
            self._scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{name}")] = 0
        self._options, self._frame = mujoco.MjvOption(), mujoco.MjrRect(0, 0, width, height)
        self._options.geomgroup[:] = [group in geom_groups for group in range(len(self._options.geomgroup))]
        if not sites:
            self._options.sitegroup[:] = 0

    def __call__(self, data: Any, camera: Any) -> UInt8[np.ndarray, "h w 3"]:
        """The scene now.

        Args:
          data: the ``mujoco.MjData`` of the model, with positions up to date.
          camera: a ``mujoco.MjvCamera``.
        """
        mujoco, everything = self._mujoco, self._mujoco.mjtCatBit.mjCAT_ALL
        mujoco.mjv_updateScene(self._model, data, self._options, None, camera, everything, self._scene)
        self._context.make_current()
        mujoco.mjr_render(self._frame, self._scene, self._library)
        picture = np.empty((self._frame.height, self._frame.width, 3), np.uint8)
        mujoco.mjr_readPixels(picture, None, self._frame, self._library)
        return picture[::-1].copy()  # the first row of OpenGL is the lowest

    def close(self) -> None:
        """Free what the graphics library holds."""
        if self._context is None:
            return
        # In this order: mujoco.Renderer's frees into the context that happens to be current, another renderer's.
        self._context.make_current()
        self._library.free()
        self._context.free()
        self._context = None

    def __del__(self):
        with contextlib.suppress(
            AttributeError, TypeError, ctypes.ArgumentError
        ):  # half made, or at the interpreter's end
            self.close()


def draws_fast(*, fast: bool) -> bool:
    """Whether a picture costs little: drawn by `Renderer` as ``fast``, or by a GPU."""
    return fast or os.environ.get("MUJOCO_GL") == "egl"


def named_camera(model: Any, name: str) -> Any:
    """A camera of the model."""
    mujoco = import_mujoco()
    camera = mujoco.MjvCamera()
    camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
    camera.fixedcamid = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, name)
    assert camera.fixedcamid >= 0, name
    return camera


def free_camera(target: Sequence[float], *, distance: float, azimuth: float, elevation: float) -> Any:
    """A camera that looks at a point [m] from so far away [m]; angles in degrees as MuJoCo counts them."""
    camera = import_mujoco().MjvCamera()
    camera.lookat[:] = target
    camera.distance, camera.azimuth, camera.elevation = distance, azimuth, elevation
    return camera


def import_mujoco() -> Any:
    """MuJoCo, drawing in memory with OSMesa unless ``$MUJOCO_GL`` says otherwise, one thread a process.

    Raises:
      InputError: it is not installed, or its library to draw with is not.
    """
    os.environ.setdefault("MUJOCO_GL", "osmesa")
    if os.environ["MUJOCO_GL"] == "osmesa":
        os.environ.setdefault("PYOPENGL_PLATFORM", "osmesa")
    os.environ.setdefault("LP_NUM_THREADS", "1")  # processes draw in parallel; Mesa's own threads would be too many
    try:
        return importlib.import_module("mujoco")
    except ModuleNotFoundError as error:
        if error.name != "mujoco":
            raise InputError(_cannot_draw(error)) from error
        raise InputError('MuJoCo is not installed; pip install "clp-jax[metaworld]".') from None
    except Exception as error:  # without the library PyOpenGL fails with whatever comes first
        raise InputError(_cannot_draw(error)) from error


def _cannot_draw(error: Exception) -> str:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return (
        f"MuJoCo cannot draw with MUJOCO_GL={os.environ.get('MUJOCO_GL')} ({reason}); install its library "
        "(apt-get install libosmesa6 for osmesa), or set MUJOCO_GL=egl."
    )


def join_vertices(
    vertices: Float[np.ndarray, "v 3"], faces: Int[np.ndarray, "f 3"], cell: float
) -> tuple[Int[np.ndarray, " g"], Int[np.ndarray, "g 3"]]:
    """Fewer faces over some of the same vertices, by joining all vertices of a cell of a grid.

    Args:
      vertices: positions [m].
      faces: three vertices each.
      cell: edge of a cell [m].

    Returns:
      Which faces are left, and their vertices now: per cell the vertex closest to the mean of the cell's.

    >>> square = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1.01, 1, 0]])
    >>> join_vertices(square, np.array([[0, 1, 2], [0, 1, 3], [1, 2, 3]]), cell=0.5)[0].tolist()
    [0]
    """
    cells = np.floor((vertices - vertices.min(axis=0)) / cell).astype(np.int64)
    _, home = np.unique(cells, axis=0, return_inverse=True)
    home = home.reshape(-1)  # NumPy 2.0 keeps an axis
    mean = np.stack([np.bincount(home, column) for column in vertices.T], axis=1) / np.bincount(home)[:, None]
    distance = np.square(vertices - mean[home]).sum(axis=1)
    order = np.lexsort((distance, home))
    closest = order[np.unique(home[order], return_index=True)[1]]
    joined = closest[home[faces]]
    corners = np.sort(joined, axis=1)
    flat = (corners[:, 0] == corners[:, 1]) | (corners[:, 1] == corners[:, 2])
    kept = np.unique(corners, axis=0, return_index=True)[1]
    kept = np.sort(kept[~flat[kept]])
    return kept, joined[kept]


def _simplify(model: Any, mesh: int, cell: float) -> None:
    """`join_vertices` on one mesh in place; what is left moves to the front, and its count says how many."""
    start, count = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
    first = model.mesh_vertadr[mesh]
    vertices = model.mesh_vert[first : first + model.mesh_vertnum[mesh]]
    faces = slice(start, start + count)
    kept, joined = join_vertices(vertices.astype(np.float64), model.mesh_face[faces].astype(np.int64), cell)
    if len(kept) == 0:  # smaller than a cell: as it was
        return
    front = slice(start, start + len(kept))
    for corners in (model.mesh_facenormal, model.mesh_facetexcoord):
        corners[front] = corners[faces][kept]
    model.mesh_face[front] = joined
    model.mesh_facenum[mesh] = len(kept)

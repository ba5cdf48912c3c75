import numpy as np
import pytest

from worldvln_edge.training.sim.scene import LANDMARK_COLOURS, build_scene
from worldvln_edge.training.sim.scene_model import DRONE_RADIUS_M, SceneModel, load_scene_model
from worldvln_edge.training.sim.solids import solid_mesh
from worldvln_edge.training.sim.textures import blob_noise


@pytest.mark.parametrize("family", ["city", "rooms"])
def test_every_scene_has_three_to_five_landmarks_with_names_of_their_own(family):
    for seed in range(12):
        scene = build_scene(family, seed)
        names = [landmark.name for landmark in scene.landmarks]
        assert 3 <= len(names) == len(set(names)) <= 5
        assert len({landmark.colour for landmark in scene.landmarks}) == len(names)
        buildings = [s for s in scene.solids if s.texture.startswith("facade") and max(np.abs(s.base_m)) < 30]
        assert len(buildings) in range(4, 9) if family == "city" else not buildings


def test_a_scene_is_the_same_for_the_same_seed_and_another_for_another():
    first, again, other = build_scene("city", 5), build_scene("city", 5), build_scene("city", 6)
    assert first.solids == again.solids
    assert first.solids != other.solids
    for name in first.textures:
        np.testing.assert_array_equal(first.textures[name], again.textures[name])


def test_an_unknown_family_or_landmark_says_what_is_known():
    with pytest.raises(ValueError, match="city, rooms"):
        build_scene("forest", 0)
    with pytest.raises(ValueError, match="it has: "):
        build_scene("city", 0).landmark("pink elephant")


def test_surfaces_have_strong_contrast_at_a_grain_of_one_to_four_metres():
    scene = build_scene("rooms", 1)
    for name in ("floor", "wall0", "wall1"):
        texture = scene.textures[name].mean(-1)
        assert texture.std() > 20
        power = np.abs(np.fft.fft2(texture - texture.mean())) ** 2
        cycles_per_m = np.fft.fftfreq(len(texture), d=16.0 / len(texture))
        radius = np.hypot(cycles_per_m[:, None], cycles_per_m[None, :])
        # a blob of g metres is half a wave of 2 g: hardly anything may be finer than half a metre
        assert power[radius > 1.0].sum() < 0.1 * power.sum()


def test_blob_noise_repeats_without_a_seam():
    noise = blob_noise(np.random.default_rng(0), 64, 16.0, 2.0)
    inner = np.abs(np.diff(noise, axis=0)).max()
    assert np.abs(noise[0] - noise[-1]).max() <= inner * 1.05


@pytest.mark.parametrize("shape", ["box", "ball", "cylinder", "cone"])
def test_a_solid_stands_on_the_ground_has_its_size_and_faces_outwards(shape):
    mesh = solid_mesh(shape, (2.0, 2.0, 3.0))
    used = mesh.vertices[np.unique(mesh.faces)]
    assert np.allclose(used.min(0)[2], 0.0)
    np.testing.assert_allclose(used.max(0) - used.min(0), (2.0, 2.0, 3.0), rtol=0.04)
    corners = mesh.vertices[mesh.faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    outwards = np.einsum("fc,fc->f", normals, corners.mean(1) - (0.0, 0.0, 1.2))
    assert (outwards > 0).all()
    np.testing.assert_allclose(np.linalg.norm(mesh.normals, axis=1), 1.0)


def test_an_impossible_solid_is_refused():
    with pytest.raises(ValueError, match="positive size"):
        solid_mesh("box", (1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="unknown shape"):
        solid_mesh("torus", (1.0, 1.0, 1.0))


@pytest.mark.parametrize("family", ["city", "rooms"])
def test_clearance_of_boxes_agrees_with_the_distance_to_their_corners(family):
    """Oracle: the distance from a point to an axis-aligned box, which needs no MuJoCo."""
    model = load_scene_model(family, 3)
    boxes = [solid for solid in model.scene.solids if solid.shape == "box"]
    others = [solid for solid in model.scene.solids if solid.shape != "box"]
    rng = np.random.default_rng(0)
    compared = 0
    for _ in range(300):
        point = rng.uniform((-12, -12, 0.5), (12, 12, 4.0))
        apart = [np.linalg.norm(np.maximum(np.maximum(s.low_m - point, point - s.high_m), 0)) for s in boxes]
        far = [np.linalg.norm(np.maximum(np.maximum(s.low_m - point, point - s.high_m), 0)) for s in others]
        expected = min(apart) - DRONE_RADIUS_M
        if min(far) < min(apart) or expected > 0.9 or min(apart) == 0:
            continue
        compared += 1
        pose = np.array([*(100 * point), 0, 0, 0])
        assert model.clearance_m(pose) == pytest.approx(expected, abs=1e-3)
    assert compared > 20


def test_inside_a_landmark_and_beyond_the_border_there_is_no_clearance():
    model = load_scene_model("city", 3)
    for landmark in model.scene.landmarks:
        centre = model.scene.landmark_centre_m(landmark.name)
        assert model.clearance_m(np.array([*(100 * centre), 0, 0, 0])) < 0
    assert model.clearance_m(np.array([2990.0, 0, 400, 0, 0, 0])) < 0
    assert model.clearance_m(np.array([0.0, 0, 5000, 0, 0, 0])) < 0


def test_a_ray_meets_the_landmark_unless_something_stands_in_between():
    model = load_scene_model("city", 3)
    landmark = model.scene.landmarks[0]
    centre = model.scene.landmark_centre_m(landmark.name)
    up = np.array([0.0, 0.0, 9.0])
    assert model.first_hit(centre + up, centre) == landmark.solid
    assert model.first_hit(centre - up, centre) != landmark.solid  # the ground is in the way
    assert model.first_hit(np.array([0, 0, 20.0]), np.array([0, 0, 21.0])) == -1


def test_landmarks_lie_on_the_side_where_the_camera_shows_them():
    """The mirror between the two handednesses is right: a landmark to the right (+y) is drawn on the right."""
    from worldvln_edge.training.sim.camera import CameraConfig, DroneCamera

    scene = build_scene("city", 3)
    model = SceneModel(scene)
    camera = DroneCamera(model, CameraConfig(image_hw=(64, 64)))
    landmark = scene.landmarks[0]
    colour = np.array(LANDMARK_COLOURS[landmark.colour], float)
    x, y, z = 100 * scene.landmark_centre_m(landmark.name)
    try:
        for offset, side in ((-25.0, 1), (25.0, -1)):
            # close by and low, so that nothing else stands in between
            pose = np.array([x - 420 * np.cos(0.3), y - 420 * np.sin(0.3), z + 80, 0, np.degrees(0.3) + offset, 0])
            frame = camera.render(pose).astype(float)
            like = frame @ colour / (np.linalg.norm(frame, axis=-1) * np.linalg.norm(colour) + 1e-9)
            columns = np.nonzero((like > 0.97) & (np.ptp(frame, axis=-1) > 60))[1]
            assert len(columns) > 20
            assert np.sign(columns.mean() - 31.5) == side
            place = camera.config.project(pose, scene.landmark_centre_m(landmark.name))
            assert place is not None
            assert place[0] * 32 + 31.5 == pytest.approx(columns.mean(), abs=4)
    finally:
        camera.close()

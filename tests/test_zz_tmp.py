import time
def test_x(new_place, one_thread):
    for n in "ab":
        t=time.time(); p=new_place(n); print("place",time.time()-t)
        for kw in ({}, {}, dict(frac=.2), dict(seed=1), dict(proj_dim=16), dict(jobs=2), dict(label_noise=.1)):
            t=time.time(); r=p.done("ablation", **kw); print(kw, r.made(), r.err, r.tags.get("reused_run_id"), time.time()-t)

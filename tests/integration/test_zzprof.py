import time
from collections import defaultdict
from tests.integration.test_crash_points import *
def test_prof(stage):
    real = stage.world.transport.execute_command
    spent = defaultdict(lambda:[0,0.0])
    names = {load(p.stem).sha: p.stem for p in Path("src/common/lua").glob("*.lua")}
    def timed(*a):
        t=time.perf_counter()
        try: return real(*a)
        finally:
            k=str(a[0])+" "+ (names.get(a[1], '') or str(a[1])[8:60].replace("\n"," "))
            spent[k][0]+=1; spent[k][1]+=time.perf_counter()-t
    class T:
        execute_command=staticmethod(timed)
        def close(self): pass
    stage.world.transport=T()
    N=20; t=time.perf_counter()
    tt=defaultdict(float)
    for _ in range(N):
        with tempfile.TemporaryDirectory() as d:
            t0=time.perf_counter(); stage.world.renew(Path(d)); t1=time.perf_counter()
            one_life(stage, Trips()); t2=time.perf_counter(); one_life(stage, Trips()); t3=time.perf_counter(); check(stage); t4=time.perf_counter()
            tt["renew"]+=t1-t0; tt["story"]+=t2-t1; tt["heal"]+=t3-t2; tt["check"]+=t4-t3
    print({k:v/N*1000 for k,v in tt.items()})
    for k,(n,s) in sorted(spent.items(), key=lambda x:-x[1][1])[:25]: print(f"{s/N*1000:8.2f} ms {n/N:5.1f} {k}")

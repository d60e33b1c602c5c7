import hashlib, time
from tests.integration.test_crash_points import *
from src.common import redis_client
C=[
("publish","if uidvalidity ~= ARGV[3] or last_uid ~= ARGV[4] then return {'STALE', uidvalidity, last_uid} end",""),
("publish","if state[1] ~= ARGV[1] then return {'FENCED', state[1] or ''} end",""),
("publish","if state[2] == ARGV[2] and uidvalidity == ARGV[5] and last_uid == ARGV[6] then return {'ALREADY'} end",""),
("publish","mails[i].known = located[i]","mails[i].known = false"),
("publish","or done[i] == 1 end","end"),
("complete","if owned[mail.sid] ~= mail.count then","if false then"),
("complete","redis.call('XDEL', KEYS[1], unpack(sids))",""),
("complete","redis.call('XACK', KEYS[1], ARGV[1], unpack(sids))",""),
("complete","redis.call('SADD', KEYS[6 + set], unpack(part))",""),
("fail","if owned[mail.sid] ~= mail.count then","if false then"),
("fail","redis.call('XDEL', KEYS[1], mail.sid)",""),
("fail","redis.call('XACK', KEYS[1], ARGV[1], mail.sid)",""),
("fail","redis.call('HDEL', KEYS[3], mail.id)",""),
("begin","if owned[mail.sid] ~= mail.count then","if false then"),
("promote","redis.call('ZREM', KEYS[4], member)",""),
("release","if owned[sid] == count then","if true then"),
("renew","owned[ARGV[i]] == ARGV[i + 1] and mine or lost","mine"),
("recover","if not busy[entry[1]] and #ids < most then","if #ids < most then"),
("recover","'IDLE', ARGV[3],","'IDLE', 0,"),
]
def test_all(stage, monkeypatch):
    for script, old, new in C:
        o=load(script); assert o.source.count(old)==1,(script,old)
        src=o.source.replace(old,new)
        m=Script(script,src,hashlib.sha1(src.encode()).hexdigest())
        monkeypatch.setattr(redis_client,"load",lambda n: m if n==script else load(n))
        print("##",script,old[:60])
        for name,story,fault,ev in [("crashB",one_life,Fault.CRASH_BEFORE,None),("crashA",one_life,Fault.CRASH_AFTER,None),("req",one_life,Fault.REQUEST_LOST,None),("reply",one_life,Fault.REPLY_LOST,None),("takeover",one_life,Fault.MEANWHILE,takeover),("forget",one_life,Fault.MEANWHILE,forgetting),("renum",one_life,Fault.MEANWHILE,renumbering),("handed-reply",handed_back,Fault.REPLY_LOST,None),("handed-take",handed_back,Fault.MEANWHILE,takeover),("renumd-take",renumbered,Fault.MEANWHILE,takeover),("renumd-crash",renumbered,Fault.CRASH_AFTER,None)]:
            t=time.time(); n=0
            try:
                for _ in break_each(stage,story,fault,(lambda: ev(stage)) if ev else (lambda:None)): n+=1
            except AssertionError as e: print("   ",name,"CAUGHT",n,round(time.time()-t,1),str(e)[:170].replace("\n"," "))
            except Exception as e: print("   ",name,"EXC",type(e),str(e)[:150])

#!lua flags=allow-oom
-- Take or renew the lease of a mailbox. It only saves work: the fence is owner + compare-and-set in publish.
-- KEYS 1 intake hash 2 uidvalidity 3 last_uid   ARGV 1 owner nonce 2 lease in µs (0: give it up, owner only)
-- -> {OK, epoch} or {HELD, µs until it ends}, both followed by until resync uidvalidity last_uid boundary horizon first_complete passed floor | GONE
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local lease = tonumber(ARGV[2])
local state = redis.call('HMGET', KEYS[1], 'owner', 'until', 'lease', 'epoch', 'boundary', 'horizon', 'first_complete', 'passed', 'floor', 'resync')
local known = {state[2] or '', state[10] or '', redis.call('GET', KEYS[2]) or '', redis.call('GET', KEYS[3]) or ''}
for i = 5, 9 do known[#known + 1] = state[i] or '' end
local owner, expires, length, epoch = state[1], tonumber(state[2] or '0'), tonumber(state[3] or '0'), state[4] or '0'
if owner ~= ARGV[1] then
  if lease == 0 then return {'GONE'} end
  -- held only while now < until <= now + length: a clock that stepped back must not hold it for ever
  if owner and now < expires and expires <= now + length then return {'HELD', tostring(expires - now), unpack(known)} end
  epoch = tostring(redis.call('HINCRBY', KEYS[1], 'epoch', 1))
end
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'until', string.format('%.0f', now + lease), 'lease', ARGV[2])
return {'OK', epoch, unpack(known)}

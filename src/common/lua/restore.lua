#!lua flags=allow-oom
-- The last step of a restore: what was laid aside takes its places, what stood there goes. Before the first write all is looked at.
-- KEYS 1 daemons, then n x {where it was laid aside, its place}, then the keys that go
-- ARGV 1 silence in ms after which a daemon counts as gone ('': nobody is asked, and what stands in the places is replaced) 2 n,
--      then n x when it expires (ms; '': never)
-- -> OK | LIVE name of a daemon | TAKEN a place where something stands | GONE what is not there any more (another restore removed it)
local n = tonumber(ARGV[2])
if ARGV[1] ~= '' then
  local time, entries = redis.call('TIME'), redis.call('HGETALL', KEYS[1])
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  for i = 1, #entries, 2 do
    local beat = tonumber(string.match(entries[i + 1], '^(%d+)|') or '0')
    if now - beat <= tonumber(ARGV[1]) then return {'LIVE', entries[i]} end
  end
  for i = 1, n do
    if redis.call('EXISTS', KEYS[2 * i + 1]) == 1 then return {'TAKEN', KEYS[2 * i + 1]} end
  end
end
for i = 1, n do
  if redis.call('EXISTS', KEYS[2 * i]) == 0 then return {'GONE', KEYS[2 * i]} end
end
for i = 2 * n + 2, #KEYS do redis.call('UNLINK', KEYS[i]) end
for i = 1, n do
  redis.call('RENAME', KEYS[2 * i], KEYS[2 * i + 1])
  if ARGV[i + 2] ~= '' then redis.call('PEXPIREAT', KEYS[2 * i + 1], ARGV[i + 2]) end
end
return {'OK'}

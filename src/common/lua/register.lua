#!lua flags=allow-oom
-- A daemon says that it is there; what has been silent for long is forgotten.
-- KEYS 1 daemons hash   ARGV 1 name 2 what is to be known of it (JSON) 3 seconds of silence after which an entry is removed
-- -> time of the server in ms, which stands before the JSON: `<ms>|<JSON>`
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local entries, silent = redis.call('HGETALL', KEYS[1]), {}
for i = 1, #entries, 2 do
  local beat = tonumber(string.match(entries[i + 1], '^(%d+)|') or '0')
  if now - beat > tonumber(ARGV[3]) * 1000 then silent[#silent + 1] = entries[i] end
end
for _, name in ipairs(silent) do redis.call('HDEL', KEYS[1], name) end
redis.call('HSET', KEYS[1], ARGV[1], string.format('%.0f', now) .. '|' .. ARGV[2])
return string.format('%.0f', now)

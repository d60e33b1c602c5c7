#!lua flags=allow-oom
-- due -> in flight: what is due becomes the caller's, with a higher delivery count than it ever had.
-- KEYS 1 stream 2 tries 3 due   ARGV 1 group 2 consumer 3 most mails   -> {stream id, delivery count, fields}...
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local taken = {}
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', string.format('%.0f', now), 'LIMIT', 0, ARGV[3])) do
  local sid, email_id = string.match(member, '^([^|]+)|(.*)$')
  local entry = redis.call('XRANGE', KEYS[1], sid, sid)[1]
  redis.call('ZREM', KEYS[3], member)
  if entry then                                   -- else deleted by hand while it waited: its index entry stays, and the audit sees it
    local count = tonumber(string.match(redis.call('HGET', KEYS[2], email_id) or '0|0', '^%d+|(%d+)')) + 1
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, sid, 'RETRYCOUNT', count, 'FORCE', 'JUSTID')
    taken[#taken + 1] = {sid, tostring(count), entry[2]}
  end
end
return taken
